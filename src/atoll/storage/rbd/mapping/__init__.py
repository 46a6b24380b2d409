"""Ways to make an image in Ceph a block device of the node. What each must do is in ``way.py``; ``choice.py`` picks one."""
