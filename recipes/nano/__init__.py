"""The recipe of `nano`, the small model in `weights/nano`: everything needed to train it again from scratch.

`scenes.py` draws synthetic images and knows what is on them; `scene_tasks.py` asks Florence-2's tasks about them, and
`places.py` asks every image token what it lies on. `train.py` trains the model (`python -m recipes.nano.train`),
`exam.py` measures a checkpoint, and `report.py` writes the metrics, curve and sheet of answers of its card.
`write_scenes.py` writes scenes and questions as files, to try `florence2 train` and `florence2 evaluate` with.
"""
