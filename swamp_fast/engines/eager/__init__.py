"""Any model on any device: autograd over the user's own forward."""
