"""Files alone: written whole, images decoded. It needs no torch, so that helpers start fast."""
