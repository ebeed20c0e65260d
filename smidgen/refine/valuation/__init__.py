"""What an image is worth: one paper, one file."""

from smidgen.refine.valuation.aum import AUM
from smidgen.refine.valuation.banzhaf import Banzhaf
from smidgen.refine.valuation.beta_shapley import BetaShapley
from smidgen.refine.valuation.data_oob import DataOOB
from smidgen.refine.valuation.el2n import EL2N
from smidgen.refine.valuation.forgetting import Forgetting
from smidgen.refine.valuation.influence import Influence
from smidgen.refine.valuation.knn_shapley import KNNShapley
from smidgen.refine.valuation.loo import LeaveOneOut
from smidgen.refine.valuation.tmc_shapley import TMCShapley

VALUATIONS = {
    "knn-shapley": KNNShapley,
    "data-oob": DataOOB,
    "tmc-shapley": TMCShapley,
    "beta-shapley": BetaShapley,
    "banzhaf": Banzhaf,
    "loo": LeaveOneOut,
    "aum": AUM,
    "forgetting": Forgetting,
    "el2n": EL2N,
    "influence": Influence,
}
