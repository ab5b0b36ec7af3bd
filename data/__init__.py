"""Data sets: a registry (`get_dataset`), their readers and converters, and the Lightning side
(`datamodule`)."""
