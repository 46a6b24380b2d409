/* The probe's guest: proves that an accelerator really runs 64-bit code at speed. Its bytes are in probe.py:
 *   gcc -c probe.S -o probe.o && objcopy -O binary -j .text probe.o probe.bin
 * QEMU's firmware loads it by its Multiboot header; it goes to long mode, uses SSE2 and cmpxchg16b, spins fifty million times (an
 * accelerator that interprets every instruction never comes to an end), and leaves through isa-debug-exit. */
    .set base, 0x100000
    .set tables, 0x200000
    .text
    .code32
start:
    .align 4
header:
    .long 0x1badb002, 0x00010000, -(0x1badb002 + 0x00010000)
    .long base + header - start, base, 0, 0, base + entry - start
entry:
    mov $tables, %edi                   /* page tables: one each of levels 4, 3, 2, with 2 MiB pages */
    xor %eax, %eax
    mov $3 * 1024, %ecx
    rep stosl
    movl $(tables + 0x1003), tables
    movl $(tables + 0x2003), tables + 0x1000
    movl $0x000083, tables + 0x2000
    movl $0x200083, tables + 0x2008
    mov $tables, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x620, %eax                     /* PAE, OSFXSR, OSXMMEXCPT */
    mov %eax, %cr4
    mov $0xc0000080, %ecx               /* EFER.LME */
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    and $~4, %eax
    or $0x80000003, %eax
    mov %eax, %cr0
    lgdt base + gdt_pointer - start
    ljmp $8, $(base + long_mode - start)
    .code64
long_mode:
    mov $tables + 0x100000, %esp
    movdqu 0(%rsp), %xmm0
    paddq %xmm0, %xmm0
    movdqu %xmm0, 16(%rsp)
    xor %eax, %eax
    xor %edx, %edx
    movq $0, 32(%rsp)
    movq $0, 40(%rsp)
    lock cmpxchg16b 32(%rsp)
    jnz bad
    mov $50000000, %ecx
1:  dec %ecx
    jnz 1b
    mov $0x10, %al                      /* exit status 2 * 0x10 + 1 */
    jmp out
bad:
    mov $0x20, %al
out:
    mov $0xf4, %dx
    outb %al, %dx
    hlt
    .align 8
gdt:
    .quad 0, 0x00af9b000000ffff
gdt_pointer:
    .word 15
    .long base + gdt - start
