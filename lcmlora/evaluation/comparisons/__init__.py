"""The figures of an evaluation: of all image sets, against solvers at equal cost, by second features, by caption."""
