"""The eager engine: autograd over the user's own forward, for any model on any device."""
