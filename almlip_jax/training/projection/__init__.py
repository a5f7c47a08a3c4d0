"""Training by variable projection: linear parameters by least squares, the few others by Gauss and Newton's method."""
