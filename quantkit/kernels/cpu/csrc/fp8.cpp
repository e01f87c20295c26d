#include "tiles.h"

extern "C" quantkit::Work quantkit_work(int tile) { return quantkit::work_for<quantkit::Fp8>(tile); }
