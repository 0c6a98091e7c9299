"""Methods: one file per paper, each with its loss functions and one subclass of `base.Method`."""
