"""The demo's pictures: named emoji on plain backgrounds in the layout of COCO captions, and the script that drew them."""
