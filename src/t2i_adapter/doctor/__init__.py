"""What is wrong with a data set, found before anyone pays for a GPU."""
