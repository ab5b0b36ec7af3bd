"""What is made once from files that a data set comes in."""
