"""Low-rank decompositions of convolutions and dense layers."""
