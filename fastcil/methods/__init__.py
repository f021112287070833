"""Methods: one file per learner, its frozen Config in it."""
