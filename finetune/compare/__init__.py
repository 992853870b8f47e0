"""Train several networks on the same images and compare them."""
