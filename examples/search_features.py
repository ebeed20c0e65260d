"""Ask a model's folder in Python, with numpy, tokenizers and onnxruntime alone, and add a feature to it.

smidgen search train --output teacher && smidgen search distill teacher --output phone
python examples/search_features.py phone "my eyes hurt when I read at night"
"""

import sys
from pathlib import Path

from smidgen.search.add import add
from smidgen.search.features import Feature
from smidgen.search.searcher import Searcher

folder, query = Path(sys.argv[1]), sys.argv[2]
searcher = Searcher.open(folder)
answer = searcher(query, count=3)
print(f"{query}: {'' if answer.fits else 'nothing fits, the closest are'}")
for hit in answer.hits:
    print(f"  {hit.score:.2f}  {hit.place}")

lamp = Feature("desk_lamp", "Lamp on the desk", "Switches the lamp beside you", ("bulb",), "Settings > Connected devices")
if lamp.id not in {feature.id for feature in searcher.features}:
    add(searcher, (lamp,))
print("bulb:", Searcher.open(folder)("bulb").hits[0].place)
