"""What each index of the compressed cache means: solvers and the tables they built."""
