"""The commands' signatures. Bodies import what they need, when they run."""
