"""The table of solvers; each file is one paper."""

from smidgen.quant.solvers.adaround import AdaRound
from smidgen.quant.solvers.aespa import AESPA
from smidgen.quant.solvers.boa import BOA
from smidgen.quant.solvers.gptq import GPTQ
from smidgen.quant.solvers.rtn import RTN

SOLVERS = {"rtn": RTN, "adaround": AdaRound, "gptq": GPTQ, "boa": BOA, "aespa": AESPA}
