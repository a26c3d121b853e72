"""What was asked for, checked before anything runs."""
