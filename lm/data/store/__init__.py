"""Token stores: flat files of tokens and offsets, their splits, copies of remote ones, and whether they changed."""
