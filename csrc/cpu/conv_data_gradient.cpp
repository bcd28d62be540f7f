// The gradient of a 3x3 convolution's input: the convolution of dy with the filters turned by half
// a turn. The mask of a pending activation and the sums over the gradient of a pending norm or bias
// are taken from each tile of the result while it lies in registers. With batch statistics a pass
// of bn_act completes dx, which needs the sums of the whole batch.
#include "conv_product.h"
#include "gradient.h"

namespace fastcnn::cpu {
namespace {

// the convolution that dy goes through
ConvShape turned(const ConvShape& shape) {
  ConvShape back = shape;
  back.h = shape.p, back.w = shape.q, back.c = shape.k;
  back.p = shape.h, back.q = shape.w, back.k = shape.c;
  back.top = 2 - shape.top, back.left = 2 - shape.left;
  return back;
}

template <class Tile, class A>
ProductPlan<Tile, A> plan_of(const ConvShape& back, int threads) {
  return {Tiling<Tile>(back).count, back.c, back.k, threads};
}

// dz as it is, where x is plain; with batch statistics dz and the sums of g = dz · post'(z) and
// g · (pre(x) - mean); else dx and the sums
template <class Tile, class A, Form F>
struct InputResult {
  static constexpr int W = kLanes<A>, T = Tile::kTile;
  using V = Values<A, W>;
  const ConvDataGradient& args;
  const Tiling<Tile>& tiling;
  const Source<A>& source;
  void* partials;  // [block][2][C]; of a plain x of no use

  template <class Lanes>
  struct Vector {
    const InputResult& all;
    int64_t c;
    Lanes lanes;
    SourceVector<A, F> source;
    Values<double, W> g{}, gx{};

    Vector(const InputResult& all, int64_t c, Lanes lanes)
        : all(all), c(c), lanes(lanes), source(all.source, c, lanes) {}

    void add(int64_t tile, const V (&y)[T][T]) {
      const Place at = all.tiling.place(tile);
      const ConvShape& shape = all.tiling.shape;
      const int rows = int(std::min<int64_t>(T, shape.p - at.p));
      const int columns = int(std::min<int64_t>(T, shape.q - at.q));
      const int64_t corner = ((at.image * shape.p + at.p) * shape.q + at.q) * shape.k + c;
      V sum{}, sum_x{};
      for (int r = 0; r < rows; ++r)
        for (int s = 0; s < columns; ++s)
          write(corner + (r * shape.q + s) * shape.k, y[r][s], sum, sum_x);
      if (F == Form::plain) return;
      g += widen<W>(sum);
      gx += widen<W>(sum_x);
    }

    void write(int64_t to, V dz, V& sum, V& sum_x) const {
      A* dx = static_cast<A*>(all.args.dx) + to;
      if (F == Form::plain) return store_lanes<W>(dx, dz, lanes);
      const V x = load_lanes<W>(all.source.x + to, lanes);
      const V centred = source.centred(x), masked = source.masked(dz, centred);
      sum += masked;
      sum_x += masked * centred;
      if (!all.args.batch_stats) dz = source.through_pre(masked * source.scale, x);
      store_lanes<W>(dx, dz, lanes);
    }

    void end(int64_t block) const {
      if (F == Form::plain) return;
      const TaskSums sums(all.partials, block, all.tiling.shape.k);
      std::memcpy(sums.g + c, &g, int64_t(lanes) * sizeof(double));
      std::memcpy(sums.gx + c, &gx, int64_t(lanes) * sizeof(double));
    }
  };

  template <class Lanes>
  Vector<Lanes> vector(int64_t c, Lanes lanes) const {
    return Vector<Lanes>(*this, c, lanes);
  }
};

// dx, where dz stands, from dz and the sums
void apply_norm(const ConvDataGradient& args, const Parallel& parallel) {
  const ConvShape& shape = args.shape;
  BnActBackward rest{args.dtype, {shape.n, shape.h, shape.w, shape.c}, args.dx, args.input.x,
                     nullptr, args.input.affine, true, args.input.pre_slope,
                     args.input.post_slope, args.dx};
  rest.dweight = args.dweight, rest.dbias = args.dbias;
  rest.part = Part::apply;
  bn_act_backward(rest, parallel);
}

}  // namespace

int64_t conv_data_gradient_workspace(const ConvShape& shape, Dtype dtype, int threads) {
  const ConvShape back = turned(shape);
  return with_tile(dtype, back, [&](auto type, auto tile) {
    const auto plan = plan_of<decltype(tile), decltype(type)>(back, threads);
    return plan.bytes() + plan.blocks() * 2 * shape.c * int64_t(sizeof(double));
  });
}

void conv_data_gradient(const ConvDataGradient& args, int threads, const Parallel& parallel) {
  const ConvShape back = turned(args.shape);
  with_tile(args.dtype, back, [&](auto type, auto tile) {
    using A = decltype(type);
    using Tile = decltype(tile);
    const Tiling<Tile> tiling(back);
    const auto plan = plan_of<Tile, A>(back, threads);
    const Source<A> source(args.input, back.k);
    void* partials = static_cast<char*>(args.workspace) + plan.bytes();
    const Filters<A> filters{static_cast<const A*>(args.filter), args.shape.k, args.shape.c, true};
    with_form(source.form, [&](auto form) {
      multiply(plan, tiling, Source<A>(args.dy), filters, args.workspace, parallel,
               InputResult<Tile, A, form()>{args, tiling, source, partials});
    });
    if (source.form == Form::plain) return;
    finish_sums(source.channels, partials, plan.blocks(), args.dweight, args.dbias);
    if (args.batch_stats) apply_norm(args, parallel);
  });
}

}  // namespace fastcnn::cpu
