"""Runtime: batching, planning and executing denoising steps on a device. Knows no HTTP."""
