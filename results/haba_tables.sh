#!/usr/bin/env bash
# The tables of the HaBa paper as commands, one row a line: bash results/haba_tables.sh tab3
# Each runs at the paper's budget (HaBa with trajectories: 100 experts, 15,000 iterations): pick
# lines. Lines are for BPC 10; edit --bpc (1 in Tab. 4, 5: 3 --basis-channels 1). Five hallucinators take the storage of 1.03 images a class, so n bases are
# compared with n + 1 images. Each row writes to a folder of its own, out/<row>. Images without
# hallucinators have MTT's effective rate (--lr-bases 10 at momentum 0.95); bases whose number asks for
# the preset of 50 images keep the step size of that of 10.
set -euo pipefail
row() { echo "== $1"; python "${@:2}" --dataset "${DATASET:-cifar10}" --out "out/$1"; }

tab1() {
  for data in svhn cifar10 cifar100; do
    for bpc in 1 9 49; do DATASET=$data row "tab1_${data}_$bpc" haba.py --bpc $bpc; done
  done
}
tab2() {
  row tab2_mtt mtt.py --ipc 11
  row tab2_mtt_haba haba.py --bpc 10
  row tab2_dm dm.py --ipc 11
  row tab2_dm_haba haba.py --objective dm --bpc 10
  row tab2_dc haba.py --objective dc --hallucinators 0 --bpc 11 --no-dsa
  row tab2_dc_haba haba.py --objective dc --bpc 10 --no-dsa
  python evaluate.py out/tab2_*/*.pt --network alexnet vgg11 resnet18
}
tab3() {
  row tab3_baseline mtt.py --ipc 11
  row tab3_idc haba.py --hallucinators 0 --basis-size 16 --bpc 44 --step-size 0.001 --lr-bases 10
  row tab3_idc_haba haba.py --basis-size 16 --bpc 40 --step-size 0.001
}
tab4() {
  row tab4_full haba.py --bpc 10
  row tab4_no_cos haba.py --bpc 10 --weight-cos 0
  row tab4_no_con haba.py --bpc 10 --weight-con 0
  row tab4_no_task haba.py --bpc 10 --weight-task 0
}
tab5() {
  row tab5_own haba.py --bpc 10 --class-hallucinators
  row tab5_share haba.py --bpc 10
  row tab5_share_same_memory haba.py --bpc 19
  row tab5_baseline mtt.py --ipc 10
}
tab6() {
  row tab6_baseline_no_dsa haba.py --hallucinators 0 --bpc 11 --no-dsa --lr-bases 10
  row tab6_no_dsa haba.py --bpc 10 --no-dsa
  row tab6 haba.py --bpc 10
}
fig6() {
  for weight in 0.01 0.1 1 10; do
    row "fig6_cos_$weight" haba.py --bpc 10 --weight-cos $weight
    row "fig6_con_$weight" haba.py --bpc 10 --weight-con $weight
  done
}
fig8() {
  row fig8_1_channel haba.py --bpc 10 --basis-channels 1
  row fig8_1_channel_same_memory haba.py --bpc 30 --basis-channels 1 --step-size 0.001
  for count in 1 2 5 10 20; do row "fig8_$count" haba.py --bpc 10 --hallucinators $count; done
}
supplement() {
  for data in mnist fashionmnist; do
    for bpc in 1 9 49; do DATASET=$data row "s1_${data}_$bpc" haba.py --bpc $bpc; done
  done
  for depth in 0 1 2 3; do row "s3_depth_$depth" haba.py --bpc 10 --depth $depth; done
  for channels in 3 8 16; do row "s4_channels_$channels" haba.py --bpc 10 --channels $channels; done
  row s5_share_conv haba.py --bpc 10 --share-conv
}
"$@"
