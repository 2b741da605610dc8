"""`python -m evaluation`: scores of any model, run or file of predictions under named protocols."""
