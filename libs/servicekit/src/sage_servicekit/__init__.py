"""What every SAGE service shares: settings, app factory, logging, error mapping, auth, the broker."""
