"""What every launch asks: which implementation takes the call, about the device, for its configuration."""
