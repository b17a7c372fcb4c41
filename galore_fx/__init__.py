"""galore_fx trains all parameters of a large model within a given GPU memory budget.

model = galore_fx.compile(model, budget="16GB", optimizer=functools.partial(torch.optim.AdamW, lr=1e-3))
loss = model(**batch).loss
loss.backward()
model.galore_fx.optimizer.step()
"""

from galore_fx.api import compile as compile
from galore_fx.api import plan as plan
from galore_fx.assembly.quantize_weights import plain_state_dict as plain_state_dict
from galore_fx.backend import optimizer as optimizer
from galore_fx.errors import BudgetError as BudgetError
from galore_fx.errors import CaptureError as CaptureError
from galore_fx.errors import GaloreFxError as GaloreFxError
from galore_fx.errors import ModelError as ModelError
from galore_fx.errors import OptimizerError as OptimizerError
from galore_fx.errors import SettingError as SettingError
from galore_fx.errors import UsageError as UsageError
from galore_fx.explanation import Explanation as Explanation
from galore_fx.explanation import explain as explain
from galore_fx.plan_record import Plan as Plan
from galore_fx.recipes.presets import RECIPES as RECIPES
from galore_fx.recipes.recipe import Recipe as Recipe
