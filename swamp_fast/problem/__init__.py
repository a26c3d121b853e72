"""A Problem holds the arguments of one call to a driver. All of them are checked before anything is trained."""
