"""What a run, or a pod that is not there, would take: counted from shapes, or compiled ahead of time."""
