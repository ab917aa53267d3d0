"""Jobs at an outside provider: claims, calls, inputs, outputs, strays."""
