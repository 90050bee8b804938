"""The ki-ds command, one file a group of commands."""
