"""What an evaluation compares besides distances to the teacher: second features, and the captions that it fails at."""
