"""Where a result came from: manifests, hashes, marks."""
