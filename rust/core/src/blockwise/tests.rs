//! Every code, every random word, every place in a block.

use super::*;
use crate::isa::Isa;

const FORMATS: [DType; 2] = [DType::E4M3, DType::E5M3];

/// One block as it is read after it was written, and its scale.
fn through<C: Compute>(dtype: DType, source: &[C], random: u32) -> (Vec<C>, u8) {
    let words = vec![random; source.len()];
    let mut codes = vec![0; source.len()];
    let mut scales = vec![0; source.len().div_ceil(BLOCK_LEN)];
    let random = Random { words: &words, shift: 0 };
    let (codes, scales) = (&mut codes[..], &mut scales[..]);
    Isa::detect().run(Encode { dtype, source, random, codes: &mut *codes, scales: &mut *scales });
    let mut target = vec![C::default(); source.len()];
    Isa::detect().run(Decode { dtype, codes, scales, target: &mut target });
    (target, scales[0])
}

/// Every finite number of the format with its sign, under one scale.
fn numbers(dtype: DType, scale: u8) -> Vec<f32> {
    let finite = |code: &u8| {
        Format::of(dtype).nan != u32::from(if dtype == DType::E4M3 { code & 0x7f } else { *code })
    };
    let codes: Vec<u8> = (0..=255).filter(finite).collect();
    let mut target = vec![0.0; codes.len()];
    let (mut codes, mut scales) = (codes, [scale; 2]);
    let (codes, scales) = (&mut codes[..], &mut scales[..]);
    Isa::detect().run(Decode { dtype, codes, scales, target: &mut target });
    target
}

#[test]
fn the_formats_have_the_numbers_that_their_names_say() {
    let mut signed = numbers(DType::E4M3, 127);
    let mut unsigned = numbers(DType::E5M3, 127);
    signed.sort_by(f32::total_cmp);
    unsigned.sort_by(f32::total_cmp);
    assert_eq!((signed.len(), signed[0], signed[253]), (254, -448.0, 448.0));
    assert_eq!((unsigned.len(), unsigned[0], unsigned[254]), (255, 0.0, 1.75 * 65_536.0));
    assert_eq!((signed[128], unsigned[1]), (2f32.powi(-9), 2f32.powi(-17)));
    assert!(signed.windows(2).all(|pair| pair[0] < pair[1] || pair == [0.0, 0.0]));
    assert!(unsigned.windows(2).all(|pair| pair[0] < pair[1]));
}

#[test]
fn what_was_read_is_written_again_as_it_was_whatever_the_random_bits() {
    for dtype in FORMATS {
        let least = Format::of(dtype).least_scale as u8;
        let greatest = (F32_BIAS * 2 - Format::of(dtype).top()) as u8;
        for scale in [least, least + 1, 100, 127, 200, greatest] {
            for block in numbers(dtype, scale).chunks(BLOCK_LEN) {
                for random in [0, 1, 0x8000, 0xffff] {
                    let again = through(dtype, block, random).0;
                    assert!(again.iter().zip(block).all(|(a, b)| a.to_bits() == b.to_bits()));
                }
            }
        }
    }
}

#[test]
fn it_is_written_again_among_neighbours_up_to_the_stated_size() {
    for (dtype, reach) in [(DType::E4M3, 13), (DType::E5M3, 29)] {
        for x in numbers(dtype, 90).into_iter().filter(|x| *x != 0.0) {
            for power in 0..=reach {
                for part in [1.0, 0.51, 0.874, 0.876] {
                    let neighbour = x.abs() * 2f32.powi(power) * part;
                    for random in [0, 0xffff] {
                        let (read, _) = through(dtype, &[x, neighbour], random);
                        assert_eq!(read[0].to_bits(), x.to_bits(), "{x:e} by {neighbour:e}");
                    }
                }
            }
        }
    }
}

/// All of the 2^16 words, so that the mean is exact but for what no word can tell apart.
#[test]
fn the_mean_over_all_random_words_is_the_number() {
    for dtype in FORMATS {
        for part in [0.93f64, 0.2, 1.3e-2, 7.7e-4, 2.3e-6] {
            let block = [1.0f32, part as f32];
            let (mut sum, mut least, mut greatest) = (0.0, f64::MAX, 0.0);
            for random in 0..1 << 16 {
                let x = f64::from(through(dtype, &block, random).0[1]);
                (sum, least, greatest) = (sum + x, x.min(least), x.max(greatest));
            }
            let off = (sum / 65_536.0 - f64::from(block[1])).abs();
            assert!(greatest > least && least <= part && part <= greatest);
            if !(dtype == DType::E5M3 && least == 0.0) {
                assert!(off <= (greatest - least) / 65_536.0, "{dtype} {part:e}: {off:e}");
            }
        }
    }
}

#[test]
fn a_number_is_off_by_less_than_the_stated_spacing() {
    for (dtype, reach) in [(DType::E4M3, 13), (DType::E5M3, 29)] {
        for i in 0..4_000u32 {
            let greatest = 2f32.powf(i as f32 * 0.03 - 60.0);
            let x = greatest * 2f32.powf((i.wrapping_mul(2_654_435_761) >> 16) as f32 / -1_700.0);
            for random in [0, 0xffff] {
                let read = through(dtype, &[x, greatest], random).0[0];
                let absolute = greatest * 2f32.powi(-reach - 3);
                assert!((read - x).abs() < (x / 8.0).max(absolute), "{x:e} in {greatest:e}");
            }
        }
    }
}

#[test]
fn the_scale_is_the_least_under_which_the_greatest_element_has_a_code() {
    for dtype in FORMATS {
        let largest = Format::of(dtype).decode(Format::of(dtype).nan as u8 - 1, 1.0);
        for x in [1.0f32, 1.75, 1.7500001, 1.99, 3.0, 1e-20, 3e38] {
            let (read, scale) = through(dtype, &[x, 0.0], 0xffff);
            let size = power_of_two(scale.into());
            assert!(x / size <= largest && x / size * 2.0 > largest, "{x:e}");
            assert!(read[0].is_finite());
        }
        let least = Format::of(dtype).least_scale as u8;
        for x in [0.0f32, 1e-45, 1e-40, f32::INFINITY, f32::NAN] {
            assert_eq!(through(dtype, &[x, 0.0], 0).1, least);
        }
    }
}

#[test]
fn what_is_not_finite_is_nan_in_its_own_place_alone() {
    for dtype in FORMATS {
        let block = [1.0f32, f32::INFINITY, 0.5, f32::NAN, 0.25, f32::NEG_INFINITY];
        let read = through(dtype, &block, 0xffff).0;
        assert_eq!([read[0], read[2], read[4]], [1.0, 0.5, 0.25]);
        assert!([read[1], read[3], read[5]].iter().all(|x| x.is_nan()));
    }
}

#[test]
fn a_second_moment_that_is_positive_never_reads_as_zero() {
    for small in [1e-30f64, 1e-38, 1e-44, 1e-60, 5e-324] {
        for greatest in [small, 1.0, 1e30] {
            let read = through(DType::E5M3, &[small, greatest, 0.0], 0).0;
            assert!(read[0] > 0.0 && read[2] == 0.0, "{small:e} in {greatest:e}");
        }
        if small as f32 > 0.0 {
            assert!(through(DType::E5M3, &[small as f32, 1.0], 0).0[0] > 0.0);
        }
    }
    assert_eq!(through(DType::E4M3, &[1e-30f32, 1.0], 0).0[0], 0.0);
}

#[test]
fn each_block_has_a_scale_of_its_own() {
    for len in [BLOCK_LEN - 1, BLOCK_LEN, BLOCK_LEN + 1, 3 * BLOCK_LEN] {
        let block = |i: usize| 2f32.powi((i / BLOCK_LEN) as i32 * 40 - 60);
        let source: Vec<f32> = (0..len).map(block).collect();
        assert_eq!(through(DType::E4M3, &source, 0).0, source);
    }
}
