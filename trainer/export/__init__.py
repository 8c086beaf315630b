"""What is delivered of a run: its result, and the forms that other programs take it in."""
