"""Training jobs as the command line sees them: submit, follow, show, merge."""
