"""From the stream to devices: `reader` reads rows, `tfdata` ahead of time, `loader` puts them on devices."""
