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

// With batch statistics dz as it is, else dx; and the sums of g = dz · post'(z), g · (pre(x) - mean)
template <class Tile, class A>
struct InputResult {
  static constexpr int W = kLanes<A>, T = Tile::kTile;
  const ConvDataGradient& args;
  const Tiling<Tile>& tiling;
  const Source<A>& source;
  void* partials;  // [block][2][C], null: not wanted

  template <class Lanes>
  struct Vector {
    const InputResult& all;
    int64_t c;
    Lanes lanes;
    Values<A, W> mean{}, scale{}, bias{};
    Slope<A, W> pre, post;
    Values<double, W> g{}, gx{};

    Vector(const InputResult& all, int64_t c, Lanes lanes)
        : all(all), c(c), lanes(lanes), pre(all.source.pre_slope), post(all.source.post_slope) {
      if (!all.partials) return;
      const Channels<A>& channels = all.source.channels;
      mean = load_lanes<W>(&channels.mean[c], lanes);
      scale = load_lanes<W>(&channels.scale[c], lanes);
      bias = load_lanes<W>(&channels.bias[c], lanes);
    }

    void add(int64_t tile, const Values<A, W> (&y)[T][T]) {
      const Place at = all.tiling.place(tile);
      const ConvShape& shape = all.tiling.shape;
      const int rows = int(std::min<int64_t>(T, shape.p - at.p));
      const int columns = int(std::min<int64_t>(T, shape.q - at.q));
      Values<A, W> sum{}, sum_x{};
      for (int r = 0; r < rows; ++r)
        for (int s = 0; s < columns; ++s) {
          const int64_t to =
              ((at.image * shape.p + at.p + r) * shape.q + at.q + s) * shape.k + c;
          Values<A, W> d = y[r][s];
          if (all.partials) {
            const Values<A, W> x = load_lanes<W>(all.source.x + to, lanes);
            const Values<A, W> centred = pre.act(x) - mean;
            Values<A, W> g = d;
            if (!post.none()) g = post.backward(g, post.negative(centred * scale + bias));
            sum += g;
            sum_x += g * centred;
            if (!all.args.batch_stats) {
              d = g * scale;
              if (!pre.none()) d = pre.backward(d, pre.negative(x));
            }
          }
          store_lanes<W>(static_cast<A*>(all.args.dx) + to, d, lanes);
        }
      g += widen<W>(sum);
      gx += widen<W>(sum_x);
    }

    void end(int64_t block) const {
      if (!all.partials) return;
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
  with_tile(args.dtype, back, [&](auto type, auto tile) -> int64_t {
    using A = decltype(type);
    using Tile = decltype(tile);
    const Tiling<Tile> tiling(back);
    const auto plan = plan_of<Tile, A>(back, threads);
    const Source<A> source(args.input, back.k);
    void* partials =
        source.plain ? nullptr : static_cast<char*>(args.workspace) + plan.bytes();
    const Filters<A> filters{static_cast<const A*>(args.filter), args.shape.k, args.shape.c, true};
    multiply(plan, tiling, Source<A>(args.dy), filters, args.workspace, parallel,
             InputResult<Tile, A>{args, tiling, source, partials});
    if (partials) {
      finish_sums(source.channels, partials, plan.blocks(), args.dweight, args.dbias);
      if (args.batch_stats) apply_norm(args, parallel);
    }
    return 0;
  });
}

}  // namespace fastcnn::cpu
