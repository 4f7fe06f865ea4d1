"""What an adapter is worth: pictures against the teacher's, at equal network evaluations; figures, plots, the gate."""
