"""What a run leaves behind: its folder, checkpoint, results, log, and how it is read again."""
