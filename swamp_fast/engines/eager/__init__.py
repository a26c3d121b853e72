"""The eager engine: runs any model on any device, by autograd through the user's own forward."""
