"""What frozen features are worth: ``features.extract`` once, then any of the judges.

features.py   images -> features, in batches of one shape, over the mesh
knn.py        weighted nearest neighbours: no training, no choices
linear.py     one linear layer, its learning rate and weight decay chosen on held-out training rows
layerwise.py  a linear layer on every map of a network, as AlexNet is judged in print
health.py     label-free signs of collapse
consistency.py  whether neighbours stay neighbours in another view; no labels
evaluate.py   all of them on one network
judge.py      which network of a run, when, and on which images

Labels enter this package only; no method ever trains on them.
"""
