"""Where training computes: devices, numeric precision, and several processes as one."""
