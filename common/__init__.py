"""What every stage needs and no reader of the paper: settings, files, weights, processes."""
