"""Starting and stopping a stack: embedded under supervisord, or containers through Docker Compose."""
