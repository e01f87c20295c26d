#include "tiles.h"

extern "C" quantkit::Work quantkit_work(int tile) { return quantkit::work_for<quantkit::Int4>(tile); }
