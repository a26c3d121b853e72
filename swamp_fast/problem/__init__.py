"""The problem: a call's arguments, checked before anything runs."""
