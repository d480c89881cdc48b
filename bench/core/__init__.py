"""What every benchmark shares: cases, inputs, the registry of providers, the reference, measurement, tables and commands."""
