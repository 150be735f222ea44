"""Filter pruning by the rank of feature maps (Lin et al., CVPR 2020); arrives with a later version."""
