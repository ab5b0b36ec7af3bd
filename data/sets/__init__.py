"""One module for each data set, or each few of one kind, which registers it. A new data set is one
more module here (see `data.registry`)."""
