"""Tasks: problems with an exact grader, and their traces in the grammar of the control tags."""
